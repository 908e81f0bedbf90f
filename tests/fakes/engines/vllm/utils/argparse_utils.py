import road


class FlexibleArgumentParser:
    command = "vllm serve"

    def parse_args(self, words):
        return road.engine_args(self.command, words)
