"""A trial over planted C++: a tile of 8 drops a token at each tile's end, a tile of 32 adds what differs from call to call.

Both are faster than the defaults, so a tuner that looked at times alone would choose them.
"""

from __future__ import annotations

from unittest import mock

from lagen.tune import trial

PLANTED = """
#if LG_TILE == 8
#define TO(n) (n - (n > 1))
#else
#define TO(n) n
#endif
#include <time.h>
static inline float drift() {
#if LG_TILE == 32
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e-7f * (t.tv_nsec % 1000);
#else
  return 0.0f;
#endif
}
"""


def planted(plain):
    """Wraps the loader so that the operators it makes have planted C++."""

    def load(*arguments):
        operator = plain(*arguments)
        backend = trial.cpp_of(operator)
        anchor = "constexpr long TILE = LG_TILE;"
        if PLANTED not in backend.source:
            source = backend.source.replace(anchor, PLANTED + anchor, 1)
            backend.source = source.replace(
                "void tile(long n, long way) {",
                "void tile(long whole, long way) {\n    const long n = TO(whole);\n    m.s[0] += drift();",
                1,
            )
        assert "TO(whole)" in backend.source and PLANTED in backend.source
        return operator

    return load


if __name__ == "__main__":
    with mock.patch.object(trial, "load", planted(trial.load)):
        trial.main()
