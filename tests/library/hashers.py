"""Defines a password hasher that records in which thread it works."""

import threading

from django.contrib.auth.hashers import MD5PasswordHasher

threads: list[str] = []


class TellingHasher(MD5PasswordHasher):
    algorithm = "telling"

    def encode(self, password, salt):
        threads.append(threading.current_thread().name)
        return super().encode(password, salt)
