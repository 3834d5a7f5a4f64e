"""halfbyte: QLoRA as a finished system, on the machine you have."""
