"""Print a checked, resolved configuration: python scripts/show_config.py NAME [key=value ...].

`scripts/run.py --config-name=NAME --info defaults-tree` shows which file contributed what.
"""

import sys

from pizero.agent.config import load_config, primary_configs, to_yaml


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(f"{__doc__}\nconfigs: {', '.join(primary_configs())}")
    try:
        print(to_yaml(load_config(sys.argv[1], sys.argv[2:])), end="")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
