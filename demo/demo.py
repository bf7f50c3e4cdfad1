"""Serve a small model on this machine and use it as one would on a cluster: `python demo/demo.py MODEL_FOLDER`."""

from __future__ import annotations

import subprocess
import sys
import tempfile

from rich.console import Console

import mii_hpc as mii

console = Console(highlight=False, soft_wrap=True)
PROMPTS = ["The for statement", "A class definition", "An exception is", "The value of"]

ELSEWHERE = """
import sys, mii_hpc as mii
client = mii.client(sys.argv[1], mii_config={"home": sys.argv[2]})
for answer in client(sys.argv[3:], max_new_tokens=32, return_full_text=True, seed=1):
    print(f"  replica {answer.replica}: {' '.join(str(answer).split())}")
"""


def main(model: str) -> None:
    """Serve, ask from a second process, stream, show who answered, terminate."""
    with tempfile.TemporaryDirectory(prefix="mii-demo-") as home:
        console.rule("serve: two replicas of two ranks each")
        client = mii.serve(model, tensor_parallel=2, replica_num=2, cluster="local", home=home)
        try:
            status = client.status()
            console.print(f"deployment '{status.deployment_name}' is {status.state} as job {status.job_id}")

            console.rule("client: another process finds it by the model's name")
            subprocess.run([sys.executable, "-c", ELSEWHERE, model, home, *PROMPTS], check=True, timeout=300)

            console.rule("stream: an answer as it is made")
            for piece in client.stream(PROMPTS[0], max_new_tokens=64, do_sample=False, return_full_text=True):
                console.out(piece, end="")
            console.print()

            console.rule("status: who answered")
            for replica in client.status().replicas:
                console.print(f"replica {replica.index} on {replica.host} served {replica.served} requests")
        finally:
            client.terminate_server()
            console.print("terminated")


if __name__ == "__main__":
    main(sys.argv[1])
