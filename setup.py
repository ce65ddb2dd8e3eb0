"""Drives CMake for the extension kimisys._core; standards, flags, sources are in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds with CMake in build/<interpreter>, kept between calls so that rebuilds are quick.

    CMake leaves the extension in kimisys/ of the source tree, so that in development
    ``cmake --build build/<interpreter>`` is all that a change of C++ needs.
    """

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / (sys.implementation.cache_tag or "python")
        built = ROOT / self.get_ext_filename(ext.name)
        wanted = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DKIMISYS_PYTHON=ON",
        ]
        jobs = str(len(os.sched_getaffinity(0)))
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *configure], check=True)
        subprocess.run(
            ["cmake", "--build", build, "--parallel", jobs, "--target", "_core"], check=True
        )
        if wanted != built:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, wanted)


setup(ext_modules=[Extension("kimisys._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
