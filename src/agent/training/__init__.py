"""What a training run is made of; pizero.agent.train puts it together."""
