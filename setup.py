"""Packaging: the metadata lives in settings.ini, this file hands it to setuptools."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(HERE / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

EXTRAS = ("images", "chat", "notebook", "tunnel", "mcp", "postgres", "dev")
extras = {name: settings[f"{name}_requirements"].split() for name in EXTRAS}
extras["all"] = sorted({req for name in EXTRAS if name != "dev" for req in extras[name]})
readme = HERE / "README.md"

setup(
    name=settings["dist_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=settings["license"],
    keywords=settings["keywords"].split(),
    packages=find_packages(include=["colab_gpu", "colab_gpu.*"]),
    package_data={"colab_gpu": ["py.typed", "service_template.ipynb", "demo_model/**/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": settings["console_scripts"].split()},
    classifiers=[
        "Development Status :: 4 - Beta",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
    zip_safe=False,
)
