"""Every output is allocated here, so that tests can fill what nobody has written yet with NaN."""

MODEL_INPUT = (None, "single", "double")  # how often the next model input is written: its place in this tuple


def empty(shape, like, dtype=None):
    """An uninitialised tensor on the device of `like`, in its dtype unless another is given."""
    return like.new_empty(shape) if dtype is None else like.new_empty(shape, dtype=dtype)


def branch_step_outputs(sample, model_output, rows, want_denoised, want_corrected, copies):
    """(x', m0 or None, xc or None, model input or None) of `branch_step` with `rows` output rows."""
    shape = (rows, *sample.shape[1:])
    return (
        empty(shape, sample),
        empty(shape, sample) if want_denoised else None,
        empty(shape, sample) if want_corrected else None,
        empty((copies * rows, *shape[1:]), model_output) if copies else None,
    )
