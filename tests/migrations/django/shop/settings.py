"""A shop on Django. The database comes from SHOP_URL."""

import os
from urllib.parse import urlsplit

url = urlsplit(os.environ["SHOP_URL"])

SECRET_KEY = "of no use outside of tests"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "shop"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": url.hostname,
        "PORT": url.port,
        "USER": url.username,
        "PASSWORD": url.password,
        "NAME": url.path.lstrip("/"),
    }
}
