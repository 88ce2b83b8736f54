"""moto's S3 server in a process of its own: ``python s3_server.py`` prints its port and ends with its standard input.

It answers one request after the other, so that a conditional put's test and put are one step, as S3's are. Not a thread
of the test process: clients written in Rust or C++ may wait for an answer without letting Python run.
"""

from __future__ import annotations

import logging
import sys
import threading

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
