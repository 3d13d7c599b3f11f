"""Encoders: LR images [B, 3, h, w] to features [B, n_feats, h, w]."""
