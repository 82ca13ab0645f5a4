"""Titles and captions of figures, in the order of the page of a run."""

from __future__ import annotations

# Figures of a run's measurements.
MEASURED = {
    "latency_cdf": (
        "Latency of every request",
        "Share of requests served within a time. A system that failed requests ends below 100%, "
        "at a cross.",
    ),
    "latency_ablation": (
        "From whole models to Djinn",
        "The same latencies for each step of the ablation, and for the best simple caches.",
    ),
    "switches": (
        "What a switch costs",
        "Share of switches within a time, by how much of its model was resident.",
    ),
    "sensitivity": (
        "Sensitivity to the capacity",
        "Speed-up over the baseline with 95% intervals, and share of requests without loads.",
    ),
    "latency_breakdown": (
        "Where the time goes",
        "Mean latency of each system by phase, in milliseconds and as shares.",
    ),
    "decode_pace": (
        "How steady decoding is",
        "Each request's decode as a multiple of the fastest of its model; a line is a repeat.",
    ),
    "residency_over_time": (
        "What fills the ring",
        "Bytes of each model after each request; hatched where only a part of it is resident.",
    ),
    "bytes_loaded": (
        "Bytes moved",
        "Weights moved for the whole trace, compared with the possible minimum.",
    ),
    "zipf": (
        "A longer trace",
        "Cost of switches and latency of requests, when models are drawn by Zipf's law.",
    ),
    "concurrent": (
        "Concurrent requests",
        "Cost of switches and latency of requests, when all are sent at once. Every system "
        "computes one request at a time, without batching.",
    ),
    "load": (
        "Load",
        "Latency from arrival at several rates, and the share of requests within a target.",
    ),
    "large_models": (
        "A model larger than the ring",
        "Time per token when layers take turns, compared with accelerate's offloading.",
    ),
    "fleet": (
        "A fleet: vLLM engines on one ring",
        "Requests to all models at once, and the resident bytes of each model over time.",
    ),
}
# Figures of the simulator and the study of policies, which do not depend on the run.
COMPUTED = {
    "simulator_validation": (
        "The simulator compared with measured rows",
        "Each point is a request of our reference run: measured and simulated.",
    ),
    "policies_distance": (
        "Policies compared with the optimum",
        "Bytes that each policy loads, as a multiple of the offline optimum.",
    ),
    "policies_capacity": (
        "The memory that makes switching free",
        "Share of all weights that must fit for a mean switch below 10 ms.",
    ),
    "policies_queue": (
        "Policies with a queue",
        "Latencies at different loads, for policies that know the queue and policies that do not.",
    ),
    "simulator_growth": (
        "How the simulator scales",
        "The cost of a request does not grow with their number.",
    ),
    "explore": ("A figure saved from the explorer", "From notebook explore, with its settings."),
}
