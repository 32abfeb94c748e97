"""Runs a migration tool's command lines in one process, which spares each the interpreter's start.

Reads one JSON list of arguments a line, `["alembic", "upgrade", "head"]`, and answers each with
one JSON object: the exit code and all that the tool printed. A command that Postgres chose to end
a deadlock is run again, as an operator does who migrates under load.
"""

import contextlib
import io
import json
import sys
import traceback


def run_alembic(arguments):
    import alembic.config

    alembic.config.main(argv=arguments)


def run_django(arguments):
    import django.core.management

    django.core.management.execute_from_command_line(["manage.py", *arguments])


TOOLS = {"alembic": run_alembic, "django": run_django}


def run_once(tool, arguments):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            TOOLS[tool](arguments)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    return code, output.getvalue()


def run(tool, arguments):
    for _ in range(20):
        code, output = run_once(tool, arguments)
        if code == 0 or "deadlock detected" not in output:
            break
    return code, output


for line in sys.stdin:
    tool, *arguments = json.loads(line)
    code, output = run(tool, arguments)
    print(json.dumps({"code": code, "output": output}), flush=True)
