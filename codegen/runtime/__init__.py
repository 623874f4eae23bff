"""The runtime that every compiled module carries, as LLVM text: contexts, memory, the thread pool, barriers, chunks."""
