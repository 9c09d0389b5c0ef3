class Checkpoint: ...


def save(*a, **k):
    print("STUB save")
