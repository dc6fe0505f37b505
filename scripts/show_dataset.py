"""Write one offline page about a data set: python scripts/show_dataset.py RLDS_FOLDER

python scripts/show_dataset.py data/bridge_dataset --robot widowx --output bridge.html
python scripts/show_dataset.py --config-name train_bridge data.path=data/bridge_dataset/1.0.0

Episodes as films, instructions, every dimension before and after normalisation, and warnings.
docs/data.md says more.
"""

from pizero.agent.show_dataset import main

if __name__ == "__main__":
    main()
