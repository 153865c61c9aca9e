"""Which errors are of the input or the machine, and no bugs: commands end with one line for them."""

import dis

DEBUG = "DIFFATTN_DEBUG"


CHATTY = (
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "transformers.utils.import_utils",
)
"""Loggers that warn of kernels, Triton or torchvision that are missing, whenever diffusers' models are imported."""


WRONG_INPUT, INTERRUPTED = 2, 130


EXPECTED_ERRORS = (ValueError, ImportError, OSError, NotImplementedError, MemoryError)
"""What is raised for wrong input, files that cannot be read or written, and extras that are missing."""


EXPECTED_NAMES = {"OutOfMemoryError", "SafetensorError", "FFmpegError", "UnpicklingError", "BadZipFile", "HTTPError"}
"""Classes of other libraries for the same, told by name because nothing heavy is imported here."""


EXPECTED_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "PytorchStreamWriter failed",
    "PytorchStreamReader failed",
)
"""Of RuntimeErrors that torch raises where memory or disk are full, or a file is cut off."""


def is_expected(error: BaseException) -> bool:
    """Whether an error is of the input or the machine, and no bug.

    A TypeError counts where code raised it by itself; one that Python raised is a bug.
    """
    if hasattr(error, "format_message") or isinstance(error, EXPECTED_ERRORS):
        return True
    if isinstance(error, TypeError):
        return _raised_on_purpose(error)
    if EXPECTED_NAMES & {kind.__name__ for kind in type(error).__mro__}:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in EXPECTED_WORDS)


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether the last instruction of the traceback is a `raise`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code.co_code
    return dis.opname[code[trace.tb_lasti]] == "RAISE_VARARGS"
