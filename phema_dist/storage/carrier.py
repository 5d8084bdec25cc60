"""Big bodies of S3 requests, carried by obstore: quicker than s3fs, and no byte needs Python's lock.

s3fs makes every request. Where it would move a big body itself (a part of an upload, a range of an object), it signs a
URL instead, and obstore's HTTP client moves the body there. obstore's own S3 client is not used: it cannot complete an
upload only if the key is free, does not tell the id of an upload that must be aborted, and cannot read profiles.

What cannot be carried raises, whatever it is, and is the caller's to move without obstore. Errors of obstore hold
signed URLs, so nobody may show them.
"""

from __future__ import annotations

import functools
import os
import re
from datetime import timedelta
from typing import Any

_HOME = os.getpid()
_NUM_RETRIES = 2  # of one body; then s3fs tries
_IDLE_SECONDS = 5.0
_REFUSED = re.compile(r"non-2xx status code: 4(?!08|09|29)\d\d|not supported")


@functools.cache
def installed() -> bool:
    """Whether obstore is there."""
    try:
        import obstore  # noqa: F401, PLC0415  an extra
    except ImportError:
        return False
    return True


def usable() -> bool:
    """Whether obstore may be used by this process: its threads do not survive a fork, and a child hangs for ever."""
    return os.getpid() == _HOME and installed()


def opened(url: str, seconds: float) -> Any:
    """Return a client for one signed URL, whose requests take at most `seconds`."""
    from obstore.store import HTTPStore  # noqa: PLC0415  an extra

    # To read the certificates of this machine takes 6 ms under Python's lock: not for http, which looks at none.
    plain = {"allow_http": True, "allow_invalid_certificates": True} if url.startswith("http://") else {}
    # Each client keeps its connections; there are as many clients as files that are being read.
    pool = {"pool_max_idle_per_host": "1", "pool_idle_timeout": timedelta(seconds=_IDLE_SECONDS)}
    options: Any = {"timeout": timedelta(seconds=seconds), **pool, **plain}
    return HTTPStore(url, client_options=options, retry_config={"max_retries": _NUM_RETRIES})


async def send(client: Any, body: memoryview) -> str:
    """Put a body, without copying it; return its ETag."""
    import obstore  # noqa: PLC0415  an extra

    etag = (await obstore.put_async(client, "", body, use_multipart=False))["e_tag"]
    if not etag:
        raise LookupError("the answer to a part has no ETag")
    return etag


async def fetch(client: Any, start: int, stop: int) -> memoryview:
    """Get the bytes from `start` to `stop`; fewer if the object ends before."""
    import obstore  # noqa: PLC0415  an extra

    return memoryview(await obstore.get_range_async(client, "", start=start, end=stop))


def refused(error: Exception) -> bool:
    """Whether the answer was a clear no, as to a client that does not ask as s3fs does; not a fault of the line."""
    return _REFUSED.search(str(error)) is not None
