"""Several processes: from one command to many and back (`launch`), and what they share in a step (`processes`)."""
