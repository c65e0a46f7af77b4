"""Operations on tensors, one per file, each beside the plain reference that specifies it."""
