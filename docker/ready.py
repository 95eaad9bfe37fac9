"""Ends with 0 where this container's teacher answers calls: the image's health check.

It asks over loopback and so checks no certificate, which is for the names that clients use. Where the server wants
certificates of its clients, HEALTH_CERT_FILE and HEALTH_KEY_FILE are one; without them the server's own is shown, which
serves where one authority signs both.
"""

import os
import ssl
import sys
import urllib.request

SECONDS = 8.0


def context() -> ssl.SSLContext:
    """How to speak TLS to this container's server."""
    made = ssl.create_default_context()
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    if os.environ.get("TEACHER_TLS_CLIENT_CA_FILE"):
        cert = os.environ.get("HEALTH_CERT_FILE") or os.environ["TEACHER_TLS_CERT_FILE"]
        key = os.environ.get("HEALTH_KEY_FILE") or os.environ["TEACHER_TLS_KEY_FILE"]
        made.load_cert_chain(cert, key)
    return made


def main() -> None:
    """The command."""
    tls = bool(os.environ.get("TEACHER_TLS_CERT_FILE"))
    url = f"http{'s' * tls}://127.0.0.1:{os.environ.get('TEACHER_HTTP_PORT') or 8000}/ready"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS, context=context() if tls else None) as answer:
            sys.exit(answer.status != 200)
    except OSError as error:  # URLError too
        sys.exit(f"not ready: {error}")


if __name__ == "__main__":
    main()
