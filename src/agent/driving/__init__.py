"""What an evaluation is made of: rollouts over simulator processes, scores, films."""
