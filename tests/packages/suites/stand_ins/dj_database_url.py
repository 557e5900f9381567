"""Stands for the package of this name, which the tests of the REST framework ask for a database."""

import json
import os


def config():
    return json.loads(os.environ["SUITE_DATABASE"])
