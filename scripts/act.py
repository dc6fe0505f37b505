"""Run a policy over a recorded dataset: predicted beside recorded actions, and tables of errors.

python scripts/act.py --checkpoint RUN --dataset RLDS_FOLDER [--episodes 4 --every 2 --out FOLDER]
python scripts/act.py --checkpoint pi0_droid --dataset droid --robot droid --tokenizer FILE

Writes report.html, metrics.json and a picture of each episode. docs/evaluation.md says more.
"""

from pizero.agent.act import main

if __name__ == "__main__":
    main()
