"""Statistics of a data set: python scripts/compute_stats.py RLDS_FOLDER --output stats.json

python scripts/compute_stats.py data/bridge_dataset --robot widowx --dialect octo --output s.json
python scripts/compute_stats.py --config-name train_bridge --output stats.json

Exact, from the arrays of the index, without reading an image; of the training split unless told
otherwise. Of a mixture, each data set has its own. docs/data.md says more.
"""

from pizero.agent.compute_stats import main

if __name__ == "__main__":
    main()
