"""Serve a sharded teacher over HTTP, for runs on other nodes."""

import importlib.util
import sys

from cli import RunParser, exit_status

USAGE = """deepspeed launch/serve_teacher.py --config FILE [key=value ...] [--host ADDRESS] [--port N]
       python launch/serve_teacher.py --config FILE [key=value ...]                    one rank"""


def main(argv: list[str]) -> None:
    """Parse, then serve until told to stop."""
    parser = RunParser(description=__doc__, usage=USAGE)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a token")
    parser.add_argument("--port", type=int, default=8400, help="port to listen on; 0: any that is free")
    parser.add_argument("--token-variable", metavar="NAME", help="environment variable with the bearer token")
    parser.add_argument("--positions", type=int, default=1 << 18, help="the most positions that one request may hold")
    given = parser.read(argv)
    if not 0 <= given.port < 65536 or given.positions < 1:
        parser.error(f"--port {given.port}, --positions {given.positions}: not a port, or no positions at all")
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} not installed: pip install 'largekd[serve]'")

    from largekd.runtime.shutdown import end_with_launcher

    end_with_launcher()
    from largekd.config.load import load_config

    config = load_config(given.config, overrides=given.overrides)

    from largekd.runtime.build_lock import require_buildable_ops

    require_buildable_ops()
    from largekd.distillation.serve import serve_over_http

    serve_over_http(
        config, host=given.host, port=given.port, token_variable=given.token_variable, positions=given.positions
    )


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:])))
