"""Language tasks on documents that no NAMM was evolved or chosen on."""
