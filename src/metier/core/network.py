"""Is there a network? Asked once and briefly, because the hub's client retries for half a minute."""

import os
import ssl
import urllib.error
import urllib.request
from functools import cache

SECONDS = 4


@cache
def reachable() -> bool:
    """Whether the hub answers at all, asked once and briefly: the client itself retries for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as e:
        return isinstance(e.reason, ssl.SSLError)  # the client may know certificates that we do not
    except (OSError, ValueError):
        return False
    return True
