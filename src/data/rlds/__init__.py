"""RLDS on disk: TFRecord files of episodes, indexed once and read by random access."""
