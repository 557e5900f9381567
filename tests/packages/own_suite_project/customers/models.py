from django.db import models
from django_tenants.models import DomainMixin, TenantMixin


class Client(TenantMixin):
    #: One of the names of `TENANT_TYPES`; tests that do not give it mean the first.
    type = models.CharField(max_length=20, default="type1")


class Domain(DomainMixin):
    pass
