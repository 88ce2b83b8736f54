"""rayfm beside FuxiCTR and a plain TorchRec loop: the same machine, data and models. See docs/speed.md."""
