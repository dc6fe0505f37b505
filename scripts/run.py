"""Run a workspace: python scripts/run.py --config-name=train_demo [key=value ...]."""

from pizero.agent.run import main

if __name__ == "__main__":
    main()
