"""Builds the C++ extensions, which are optional: without a compiler Python does the same, slower. The rest is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("stratakv/_native")
KERNELS = Path("workers/engine/kernels")


def extension(name: str, directory: Path, flags: list[str]) -> Extension:
    headers = [*directory.glob("*.h"), *NATIVE.glob("*.h")]
    return Extension(
        name,
        sources=sorted(str(path) for path in directory.glob("*.cpp")),
        depends=sorted({str(path) for path in headers}),
        include_dirs=[str(NATIVE)],
        language="c++",
        extra_compile_args=["-std=c++17", "-g0", "-fvisibility=hidden", "-Wno-maybe-uninitialized", *flags],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
        optional=True,
    )


setup(
    ext_modules=[
        extension("stratakv._native._moves", NATIVE, ["-O2"]),
        extension("workers.engine.kernels._kernels", KERNELS, ["-O3", "-fno-math-errno"]),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
