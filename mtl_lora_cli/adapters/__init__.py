"""The adapters: MTL-LoRA on any `nn.Linear` of any model, free of any thought of text or tasks' data."""
