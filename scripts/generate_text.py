"""Ask a PaliGemma about a picture.

python scripts/generate_text.py --weights FOLDER --image kitchen.jpg --prompt "caption en"
"""

from pizero.agent.speak import main

if __name__ == "__main__":
    main()
