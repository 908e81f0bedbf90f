"""Fetch the locked uv with nothing but Python 3.8 and its standard library: no pip, no venv.

    python3 scripts/get_uv.py locks/cpu.txt FOLDER     prints the path of the program, FOLDER/uv

uv's wheel is a zip file on the package index: UV_DEFAULT_INDEX or PIP_INDEX_URL where one is set,
else PyPI. A mirror is as good as PyPI, since the file must have one of the hashes in the lock.
"""

import base64
import hashlib
import html.parser
import http.client
import io
import os
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile

PYPI = "https://pypi.org/simple"  # where pip and uv look when nothing else is configured
PLATFORM = "manylinux_2_17_x86_64"
ANOTHER_MIRROR = "set PIP_INDEX_URL to another mirror of PyPI, then repeat make setup"


def fail(message):
    print("error: " + message, file=sys.stderr)
    sys.exit(2)


class Links(html.parser.HTMLParser):
    """The addresses that an index page (PEP 503) links to, as they stand there."""

    def __init__(self, page):
        super().__init__()
        self.addresses = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "a":
            self.addresses.append(dict(attributes).get("href") or "")


def fetch(address):
    """(content, the address it came from in the end); the usual proxy variables are honoured."""
    parts = urllib.parse.urlsplit(address)
    login, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(
        parts._replace(netloc=host).geturl(), headers={"Accept": "text/html, */*;q=0.1"}
    )
    if login:  # https://user:password@host/, as pip takes it
        word = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", "Basic " + word)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read(), answer.geturl()


def fetch_or_fail(address):
    host = urllib.parse.urlsplit(address).netloc.rpartition("@")[2] or address
    try:
        return fetch(address)
    except (OSError, http.client.HTTPException, ValueError) as e:
        reason = getattr(e, "reason", e)
        if isinstance(reason, ssl.SSLCertVerificationError):
            fail(
                f"the certificate of {host} cannot be verified ({reason.verify_message}): "
                "install ca-certificates, or name the certificate of your proxy in SSL_CERT_FILE, "
                "then repeat make setup"
            )
        fail(
            f"could not fetch uv from {host} ({str(reason) or type(reason).__name__}): "
            "check the network, the variable https_proxy, or set PIP_INDEX_URL to a mirror of "
            "PyPI, then repeat make setup"
        )


def locked(lock):
    """(version of uv, hashes of its files) in a lock file."""
    with open(lock, encoding="utf-8") as file:
        entry = re.search(r"^uv==(\S+) \\\n(?:    --hash=.*\n)+", file.read(), re.M)
    return entry[1], set(re.findall("sha256:([0-9a-f]{64})", entry[0]))


def file_name(address):
    return urllib.parse.urlsplit(address).path.rpartition("/")[2]


def main():
    lock, folder = sys.argv[1:]
    version, hashes = locked(lock)

    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("PIP_INDEX_URL") or PYPI
    page, base = fetch_or_fail(index.rstrip("/") + "/uv/")
    host = urllib.parse.urlsplit(base).netloc
    addresses = Links(page.decode("utf-8", "replace")).addresses
    wanted = re.compile(f"uv-{re.escape(version)}-.*{PLATFORM}")
    wheels = [address for address in addresses if wanted.match(file_name(address))]
    if not wheels:
        fail(f"{host} has no uv {version} for Linux on x86-64: {ANOTHER_MIRROR}")
    wheel, _ = fetch_or_fail(urllib.parse.urljoin(base, wheels[0].partition("#")[0]))
    if hashlib.sha256(wheel).hexdigest() not in hashes:
        fail(
            f"what {host} gave for uv {version} has none of the hashes in {lock}: {ANOTHER_MIRROR}"
        )

    os.makedirs(folder, exist_ok=True)
    program = os.path.join(folder, "uv")
    with open(program, "wb") as file:
        file.write(zipfile.ZipFile(io.BytesIO(wheel)).read(f"uv-{version}.data/scripts/uv"))
    os.chmod(program, 0o755)
    print(program)


if __name__ == "__main__":
    main()
