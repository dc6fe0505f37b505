"""Turn any published checkpoint into another layout, or into a policy folder of ours.

python scripts/convert_weights.py SRC --inspect        what it is, without writing
python scripts/convert_weights.py SRC DST              weights, and the whole policy if SRC has it
python scripts/convert_weights.py SRC DST --robot droid --tokenizer paligemma_tokenizer.model
python scripts/convert_weights.py SRC DST --to openpi  or --to lerobot
"""

from pizero.agent.weights.command import main

if __name__ == "__main__":
    main()
