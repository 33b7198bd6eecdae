"""Texts of ``KVResponse.reason``: reasons for which tasks do not succeed."""

WAS_RESET = "the cache was reset after this task was matched; match again"
LATE = "the transfer took longer than op_timeout_s"
STILL_RUNS = "the transfer still runs: wait again before its pages are used for anything else"
INTERNAL = "an internal error; see the log"
CANCELLED = "the task was cancelled"
LOAD_FAILED = "a load that the saved pages depend on did not succeed, so their KV is not known to be right"
NO_DAEMON = "the daemon does not answer or has ended, so the result of its transfers is not known"
NOTHING_TO_DO = "the daemon has nothing to do for this task, and its reply was late"
RANK_LOST = "a rank ended or left before the copies were complete"
NOT_MOVED = "some blocks are not cached any more, name a page that does not exist, or could not be copied"
NO_TASK = "no such task, or its result was taken"
NOT_MATCHED = "not known: match first, or it expired or was cancelled"
NOT_READY = (
    "nothing can be moved: not every rank has registered its tensors yet (KVManager.wait_ready waits for them), or the "
    "manager was shut down or is out of service"
)


def no_such_page(page: int, num_pages: int) -> str:
    """Reason of a task whose slot mapping contains ``page``, when the rank's tensors have ``num_pages`` pages."""
    return (
        f"page {page} of a cache with {num_pages} pages: is the first dimension of the tensors the pages? See page_dim "
        "of tensor_spec"
    )


def not_launched(seconds: float) -> str:
    """Reason of a task that was matched and not launched within ``seconds``."""
    return f"the task was not launched within {seconds:g} s; match again"
