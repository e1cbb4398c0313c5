"""Prints what makes a shell complete `bipe`: commands, flags, config fields and their values.

In ~/.bashrc: eval "$(bipe completion bash)"
In ~/.zshrc, after compinit: eval "$(bipe completion zsh)"
"""

from argcomplete import shell_integration

from bipe_jax import commands

if __name__ == "__main__":
    args = commands.parser("completion").parse_args()
    print(shell_integration.shellcode(["bipe"], shell=args.shell))
