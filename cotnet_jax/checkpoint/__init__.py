"""What a run keeps on disk: its checkpoints and its workdir."""
