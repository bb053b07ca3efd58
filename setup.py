"""Builds the C++ extension, which is optional: without a compiler Python does the same, slower. The rest is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("stratakv/_native")

setup(
    ext_modules=[
        Extension(
            "stratakv._native._moves",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            language="c++",
            extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wno-maybe-uninitialized"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
