"""`python -m lesft.healthcheck PORT`: whether a control API on this machine answers.

For containers. It asks with TLS first and without after that, and shows no certificate to anybody:
what answers on this machine's own address is the service.
"""

import http.client
import ssl
import sys


def is_healthy(port: int) -> bool:
    """Whether GET /healthz answers with 200."""
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    return _answers(
        http.client.HTTPSConnection("127.0.0.1", port, timeout=4, context=unverified)
    ) or (_answers(http.client.HTTPConnection("127.0.0.1", port, timeout=4)))


def _answers(connection: http.client.HTTPConnection) -> bool:
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not is_healthy(int(sys.argv[1])))
