"""The single process: `python -m infini_train.selftest.reference DEVICE FILE...` does the runs of these configs."""

import sys

from infini_train.config.files import load_run


def main(wanted: str, files: list[str]) -> None:
    """Does one run after the other."""
    from infini_train.parallel import device

    device.prepare(wanted)
    from infini_train.parallel import mesh
    from infini_train.selftest.program import run_program

    for file in files:
        run_program(load_run(file))
    mesh.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
