from .base import Pass
class ConvBatchNorm(Pass):
    name="conv_bn"; level="model"
    def find(self,facts): return ()
