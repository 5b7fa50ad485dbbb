"""moto's S3 server: PORT FOLDER. The bucket `data` has the folder's files before it listens."""

import sys
from pathlib import Path

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import main

port, folder = sys.argv[1], Path(sys.argv[2])
backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
backend.create_bucket("data", "us-east-1")
for path in folder.rglob("*"):
    if path.is_file():
        backend.put_object("data", f"pile/{path.relative_to(folder)}", path.read_bytes())
main(["-p", port])
