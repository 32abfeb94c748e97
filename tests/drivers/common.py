"""What the Python driver scripts share: where to connect, and a list of named behaviours.

A driver script runs each behaviour and prints one JSON line for it, {"name", "result"}. The test
runs the script twice, directly and through the proxy, and compares the lines. So a result holds
whatever the client could observe, and nothing that differs between two runs (process ids,
object ids, ports, times).
"""

import json
import os
import re
import time
import traceback

HOST = os.environ["DRIVER_HOST"]
PORT = int(os.environ["DRIVER_PORT"])
USER = os.environ["DRIVER_USER"]
PASSWORD = os.environ["DRIVER_PASSWORD"]
DBNAME = os.environ["DRIVER_DBNAME"]
# Set when the server (or the proxy) speaks TLS: only the behaviours about TLS are run then.
TLS_ROOT = os.environ.get("DRIVER_TLS_ROOT")

behaviours = []


def behaviour(function):
    """Puts a function on the list; what it returns is its result."""
    behaviours.append(function)
    return function


def canonical(value):
    """JSON without what differs between two runs."""
    if isinstance(value, dict):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "bytes:" + bytes(value).hex()
    if isinstance(value, str):
        # psql centres a heading by the width of the number in it.
        value = re.sub(r'(?m)^ +(Table ")pg_temp_\d+', r"\1pg_temp_N", value)
        return re.sub(r"\bpg_temp_\d+", "pg_temp_N", re.sub(rf"\b{PORT}\b", "PORT", value))
    if value is None or isinstance(value, (bool, int)):
        return value
    return canonical(repr(value))


def record(name, result):
    print(json.dumps({"name": name, "result": canonical(result)}, ensure_ascii=True), flush=True)


def selected():
    wanted = [f for f in behaviours if f.__name__.startswith("tls_") == bool(TLS_ROOT)]
    only = os.environ.get("DRIVER_ONLY")
    return [f for f in wanted if not only or only in f.__name__]


def record_unexpected(name, error):
    # The test refuses such a line, also where both runs agree on it.
    trace = "".join(traceback.format_exception(error))
    print(json.dumps({"name": name, "unexpected": trace}, ensure_ascii=True), flush=True)


def eventually(condition):
    """Waits for what must come soon; a minute bounds what never comes."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError("never became true")
