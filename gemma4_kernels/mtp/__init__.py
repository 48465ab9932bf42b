"""Multi-token prediction: the drafter, and speculative generation for a batch that never changes the text.

    from gemma4_kernels import mtp
    mtp.generate(model, drafter, input_ids, ...)

See docs/mtp.md.
"""
