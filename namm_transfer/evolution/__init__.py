"""Evolution of a NAMM on language: tasks on real text, populations as batches, CMA-ES."""
