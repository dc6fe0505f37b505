"""`make demo`: collect, train, evaluate, report (config/demo.yaml); key=value changes any of it."""

import sys

from pizero.agent.run import main

if __name__ == "__main__":
    sys.argv[1:1] = ["--config-name=demo"]
    main()
