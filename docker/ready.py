"""Ends with 0 where this container's teacher answers calls: the image's health check.

It asks over loopback and so checks no certificate, which is for the names that clients use.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

SECONDS = 8.0

tls = bool(os.environ.get("TEACHER_TLS_CERT_FILE"))
port = os.environ.get("TEACHER_HTTP_PORT", "8000")
url = f"http{'s' * tls}://127.0.0.1:{port}/ready"
context = None
if tls:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if os.environ.get("TEACHER_TLS_CLIENT_CA_FILE"):  # mutual TLS: the server's own certificate stands for a client's
        context.load_cert_chain(os.environ["TEACHER_TLS_CERT_FILE"], os.environ["TEACHER_TLS_KEY_FILE"])
try:
    with urllib.request.urlopen(
        f"http{'s' * tls}://127.0.0.1:{port}/ready", timeout=SECONDS, context=context
    ) as answer:
        sys.exit(answer.status != 200)
except (urllib.error.URLError, OSError) as error:
    sys.exit(f"not ready: {error}")
