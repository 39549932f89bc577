"""The page's JavaScript. Nobody is there to run it."""

from . import asked

callbacks = {}


def register_callback(function_name, callback):
    "Let the page call `callback` as `google.colab.kernel.invokeFunction(function_name, …)`."
    asked("output.register_callback", function_name)
    callbacks[function_name] = callback


def eval_js(script, ignore_result=False, timeout_sec=None):
    "Run `script` in the page."
    asked("output.eval_js", script)


def enable_custom_widget_manager():
    "Let widgets from other packages be shown."
    asked("output.enable_custom_widget_manager")
