"""Send images to `resnet-fast serve` as several clients at once: ``python examples/serve_client.py URL IMAGE...``.

Standard library only. A server whose queue is full says when to try again, and the client does.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def classify(url: str, image: Path, tries: int = 5) -> dict[str, Any]:
    """Return the server's answer; raise RuntimeError with the server's reason if there is none."""
    request = urllib.request.Request(f"{url}/predict?topk=1", image.read_bytes(), {"Content-Type": "image/*"})
    for left in reversed(range(tries)):
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code not in (429, 503) or not left:
                raise RuntimeError(f"{image}: {error.code} {error.read().decode()}") from None
            time.sleep(float(error.headers.get("Retry-After", 1)))
    raise AssertionError("not reached")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    server, *images = sys.argv[1:]
    with ThreadPoolExecutor(8) as clients:  # requests that wait at the same time share a forward
        for image, answer in zip(images, clients.map(lambda image: classify(server, Path(image)), images), strict=True):
            print(f"{image}: {answer['predictions'][0]['label']} {answer['predictions'][0]['probability']:.1%}")
